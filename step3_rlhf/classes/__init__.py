"""The class of each response, and the class's share under the reference."""

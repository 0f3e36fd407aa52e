"""The bundled world: a synthetic population whose preferences are known exactly."""

"""Models of what people prefer: the probabilities of choices and rankings, given rewards."""

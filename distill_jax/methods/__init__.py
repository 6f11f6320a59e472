"""What travels along an edge of the graph: the terms of a student's loss, one file a family."""

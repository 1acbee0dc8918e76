"""What the compiler makes of a network's launches, and how long they should take: no GPU needed."""

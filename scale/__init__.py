"""Two players on the hardware that people have: README.md says which way is for which."""

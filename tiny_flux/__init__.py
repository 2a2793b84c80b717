"""A FLUX.1 pipeline of 5.4 million parameters that really draws, and the code that trains it."""

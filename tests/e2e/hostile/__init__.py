"""The table of bad inputs for test_hostile.py: a row is a command, what is wrong with its input, the change that makes it
so, and what the program has to say. `inputs` makes the good inputs, `changes` spoils them."""

"""What an adapter can do to a tensor: a formula for each kind, with the checks of what it is made of.

In the formulas W is the tensor as the checkpoint has it, (out, in) or (out, in, height, width), and m the
strength that the user asked for.
"""

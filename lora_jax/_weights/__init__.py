"""What a weight is, and which weights are chosen. Nothing here knows of factors.

In reading order:

* ``quantized``: weights of integers and scales.
* ``paths``: names for the leaves of a tree.
* ``ranges``: parts of a weight, ``kernel[:, 0:768]``, and rows of a table.
* ``axes``: layouts, a letter an axis: ``b``, ``i`` or ``o``.
* ``layouts``: what a function does with each weight, as ``layout_of`` finds.
* ``conventions``: what names tell, where no function was asked.
* ``target``: one chosen weight as a matrix, and keys for it.
* ``selector``: patterns over paths; ``layers``: some layers; ``choose``: all of it together.
* ``plan``: what ``lorafy`` checks before it makes a factor.
"""

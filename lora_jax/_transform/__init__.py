"""``lora(fn)``: read the function's equations, and add the low-rank path beside each weight.

In reading order:

* ``labelled``: arrays with labelled axes, and their products; ``one_hot``: the factor that picks
  table rows; ``regroup``: axes that a reshape splits and joins.
* ``origin``: the weight behind an array; ``probe``: what goes with a weight; ``delta``: an update
  ``scale * a b``; ``pick``: the member of a stack that counts; ``dora``: the gains of columns.
* ``lazy``: a weight that is not built yet; ``lora_array``: a weight and its updates.
* ``use``: one use of a weight; ``record``: all uses and costs; ``dropout``; ``context``: one run.
* ``rule``: the table of rules; ``rules``: one rule per primitive, in families; ``interpret``:
  equation by equation.
* ``call``: the arguments, traced; ``whole``: a warning if all of them are differentiated; ``lora``:
  the transformation.
* ``discover``: ``layout_of``; ``report``: uses and costs.
"""

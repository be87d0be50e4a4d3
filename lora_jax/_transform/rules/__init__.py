"""The rules: what an equation makes of a weight with an update, one per primitive.

* ``dot``, ``conv``, ``gather``, ``ragged``: the weight is read, and meets an input.
* ``arith``: multiples, sums; ``reshape``, ``slice``, ``move``: its axes change.
* ``control``: loops, branches, and functions inside of functions.
"""

from lora_jax._transform.rules import arith as arith
from lora_jax._transform.rules import control as control
from lora_jax._transform.rules import conv as conv
from lora_jax._transform.rules import dot as dot
from lora_jax._transform.rules import gather as gather
from lora_jax._transform.rules import move as move
from lora_jax._transform.rules import ragged as ragged
from lora_jax._transform.rules import reshape as reshape
from lora_jax._transform.rules import slice as slice

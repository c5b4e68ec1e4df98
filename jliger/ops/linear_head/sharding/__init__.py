"""sharding: what each device computes of the operation, and how devices' results come together.

Where the inputs' axes are known decides how. Manual ones (a user's `shard_map`): this device's share is all there is.
Explicit ones: a `shard_map` made from the types. Auto ones: `custom_partitioning`, asked by XLA once it has chosen. The
share itself is one and the same (`sharding.shard`), and so is who sums what with whom (`sharding.plan`).
"""

from jliger.ops.linear_head.sharding.dispatch import label_weights as label_weights
from jliger.ops.linear_head.sharding.dispatch import pre_divide_cotangent as pre_divide_cotangent
from jliger.ops.linear_head.sharding.dispatch import run as run
from jliger.ops.linear_head.sharding.dispatch import total_class_weight as total_class_weight
from jliger.ops.linear_head.sharding.dispatch import undo_cotangent_split as undo_cotangent_split
from jliger.ops.linear_head.sharding.dispatch import vocab_size as vocab_size
from jliger.ops.linear_head.sharding.passes import LossPass as LossPass
from jliger.ops.linear_head.sharding.passes import Result as Result

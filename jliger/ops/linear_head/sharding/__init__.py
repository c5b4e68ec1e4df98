"""Runs a loss pass on sharded arrays, on mesh axes of any type.

The type of the mesh axes decides how the pass is distributed. Manual axes (inside a user's `shard_map`): the pass runs
on this device's arrays. Explicit axes: a `shard_map` whose specs follow from the arrays' types. Auto axes:
`custom_partitioning`, whose callback XLA calls once it has chosen shardings. In all three cases `sharding.shard`
computes one device's part, and `sharding.plan` decides which axes to gather, sum and scatter over.
"""

from jliger.ops.linear_head.sharding.dispatch import label_weights as label_weights
from jliger.ops.linear_head.sharding.dispatch import pre_divide_cotangent as pre_divide_cotangent
from jliger.ops.linear_head.sharding.dispatch import run as run
from jliger.ops.linear_head.sharding.dispatch import total_class_weight as total_class_weight
from jliger.ops.linear_head.sharding.dispatch import undo_cotangent_split as undo_cotangent_split
from jliger.ops.linear_head.sharding.dispatch import vocab_size as vocab_size
from jliger.ops.linear_head.sharding.passes import LossPass as LossPass
from jliger.ops.linear_head.sharding.passes import Result as Result

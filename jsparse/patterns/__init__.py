"""Block masks and the ways to build them."""

from __future__ import annotations

from jsparse.patterns import device as device
from jsparse.patterns._block_mask import BlockMask as BlockMask
from jsparse.patterns._block_mask import BlockState as BlockState
from jsparse.patterns._block_mask import Capacity as Capacity
from jsparse.patterns._block_mask import CapacityError as CapacityError
from jsparse.patterns._builders import from_blocks as from_blocks
from jsparse.patterns._builders import from_dense as from_dense
from jsparse.patterns._builders import global_ as global_
from jsparse.patterns._builders import random as random
from jsparse.patterns._builders import segments as segments
from jsparse.patterns._builders import strided as strided
from jsparse.patterns._builders import window as window
from jsparse.patterns._groups import join_groups as join_groups
from jsparse.patterns._groups import split_groups as split_groups
from jsparse.patterns._ordering import Ordering as Ordering
from jsparse.patterns._ordering import order as order
from jsparse.patterns._rules import Distance as Distance
from jsparse.patterns._rules import Segments as Segments
from jsparse.patterns._rules import Window as Window
from jsparse.patterns._structure import atom_windows as atom_windows
from jsparse.patterns._structure import contacts as contacts
from jsparse.patterns._structure import expand as expand
from jsparse.patterns._structure import knn as knn
from jsparse.patterns._structure import neighbors as neighbors
from jsparse.patterns._structure import radius as radius

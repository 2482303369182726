"""What the programs measure with: time, memory, error, and the machine's name.

Called by the command line, its main job and the benchmarks; never by the library.

* ``_machine.py``: device, versions, memory that is there and memory that was used;
* ``_timing.py``: compiling and timing one call, so that Ctrl-C works meanwhile;
* ``_rows.py``: attention of some rows written out in NumPy, to check results with;
* ``_clocks.py``: the GPU's clock and power meanwhile;
* ``_turns.py``: runs that prepare side by side and time alone;
* ``_progress.py``: progress on stderr.
"""

from __future__ import annotations

from jsparse.measure._clocks import ClockWatch as ClockWatch
from jsparse.measure._errors import BadInput as BadInput
from jsparse.measure._machine import available_memory as available_memory
from jsparse.measure._machine import git_commit as git_commit
from jsparse.measure._machine import installed_version as installed_version
from jsparse.measure._machine import machine as machine
from jsparse.measure._machine import peak_device_memory as peak_device_memory
from jsparse.measure._machine import peak_memory as peak_memory
from jsparse.measure._machine import reset_peak_memory as reset_peak_memory
from jsparse.measure._machine import versions as versions
from jsparse.measure._progress import Progress as Progress
from jsparse.measure._rows import Allowed as Allowed
from jsparse.measure._rows import ExpectedRows as ExpectedRows
from jsparse.measure._rows import RowBias as RowBias
from jsparse.measure._rows import RowCheck as RowCheck
from jsparse.measure._rows import check_rows as check_rows
from jsparse.measure._rows import choose_rows as choose_rows
from jsparse.measure._rows import expect_rows as expect_rows
from jsparse.measure._rows import within_cutoff as within_cutoff
from jsparse.measure._timing import Compiled as Compiled
from jsparse.measure._timing import compile_call as compile_call
from jsparse.measure._timing import in_background as in_background
from jsparse.measure._timing import kernel_times as kernel_times
from jsparse.measure._timing import percentiles as percentiles
from jsparse.measure._timing import time_call as time_call
from jsparse.measure._timing import useful_flops as useful_flops
from jsparse.measure._turns import Turns as Turns

"""Benchmarks: named cases, peers, records, and the tables made of records.

Called by ``jsparse bench``; it computes with the public operation only.

* ``_patterns.py``: block lists, and ``data/`` for those that come from a structure;
* ``_cases.py``: what is measured, by name; ``_kinds.py``: what kinds there are;
* ``_models.py``: attention of models, with its bias, and who else computes it;
* ``_peers.py``: what it is measured against; ``_contract.py``: what a peer must do;
* ``_runner.py``: how it is measured, with ``_contest.py`` for attention and
  ``_builds.py`` for masks;
* ``_records.py``: ``records/``, one JSON file for each run, and Markdown tables;
* ``_profile.py``: hardware counters;
* ``_tuning.py``: the fastest configs of our kernels;
* ``_plots.py``: pictures of the records;
* ``_targets.py``: what the records should say.
"""

from __future__ import annotations

from jsparse.bench._cases import LATENCY_CASES as LATENCY_CASES
from jsparse.bench._cases import all_cases as all_cases
from jsparse.bench._cases import choose_cases as choose_cases
from jsparse.bench._contract import Peer as Peer
from jsparse.bench._peers import PEERS as PEERS
from jsparse.bench._plots import plots as plots
from jsparse.bench._records import facts as facts
from jsparse.bench._records import markdown as markdown
from jsparse.bench._records import read_records as read_records
from jsparse.bench._records import records_folder as records_folder
from jsparse.bench._records import render_into as render_into
from jsparse.bench._records import write_record as write_record
from jsparse.bench._runner import Options as Options
from jsparse.bench._runner import run_case as run_case
from jsparse.bench._targets import choose_targets as choose_targets
from jsparse.bench._targets import judge_targets as judge_targets
from jsparse.bench._targets import targets_tables as targets_tables
from jsparse.bench._tuning import read_entries as read_entries
from jsparse.bench._tuning import write_entries as write_entries

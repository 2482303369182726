"""What `jsparse run` leaves on disk: ``report.html``, ``pattern.png``, ``report.json``.

Takes the plain data of a job and its mask; computes nothing. The page is one file that
opens without a network. Files appear whole: each is written beside its place and then
renamed, so a report that was there before survives until the new one is complete.

* ``_pictures.py``: block map and load histogram, with matplotlib;
* ``_page.py``: the page around them;
* ``_files.py``: folders and atomic writing.
"""

from __future__ import annotations

from jsparse.report._files import prepare_folder as prepare_folder
from jsparse.report._files import write_file as write_file
from jsparse.report._page import Facts as Facts
from jsparse.report._page import facts as facts
from jsparse.report._page import format_bytes as format_bytes
from jsparse.report._page import format_error as format_error
from jsparse.report._page import format_seconds as format_seconds
from jsparse.report._page import map_title as map_title
from jsparse.report._page import to_json as to_json
from jsparse.report._page import verdict as verdict
from jsparse.report._page import write_report as write_report
from jsparse.report._pictures import LIGHT as LIGHT
from jsparse.report._pictures import Theme as Theme
from jsparse.report._pictures import add_legend as add_legend
from jsparse.report._pictures import block_map as block_map
from jsparse.report._pictures import load_histogram as load_histogram
from jsparse.report._pictures import paint as paint
from jsparse.report._pictures import to_png as to_png

"""The log of periods, alone."""

import json

from lisa_dist.core.period_log import PeriodLog, PeriodRecord
from lisa_dist.run_folder import LOG_NAME


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path):
    (tmp_path / LOG_NAME).write_text('{"step": 0}\n{"step": 3}\n{"step": 6, "lay')
    log = PeriodLog()
    log.write_to(str(tmp_path))
    log.resumed = True
    log.open(PeriodRecord(3, 9, [0], [], 0.0, 0, 0, 0))
    log.close(10, lambda: {"live_bytes": 1})
    assert [json.loads(line)["step"] for line in (tmp_path / LOG_NAME).read_text().splitlines()] == [0, 3, 9]

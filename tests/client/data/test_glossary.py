"""Every reason and flag has its sentence."""

import re
from pathlib import Path

from client.data.glossary import FLAGS, REASONS
from client.data.study import Reason


def test_every_reason_is_explained() -> None:
    assert set(REASONS) == set(Reason)


def test_every_flag_that_the_import_sets_is_explained() -> None:
    folder = Path("client/data")
    texts = [path.read_text() for path in folder.glob("*.py") if path.name != "glossary.py"]
    pattern = r'(?:flags\.add\(|flags\[.+\]\.add\(|link\([^)]*, )"([a-z-]+)"|\["(labels-disagree)"\]'
    found = {one or other for text in texts for one, other in re.findall(pattern, text)}
    assert found == set(FLAGS)

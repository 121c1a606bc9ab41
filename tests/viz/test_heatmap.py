"""Heat maps: files that need nothing from outside, with the values in them."""

import json
import re
import struct

import pytest
import torch

from transformer_lens.viz import Heatmap


def heatmap(**changes) -> Heatmap:
    options = {"rows": ["0", "1"], "columns": [" the", " the", "<b>"], "title": "a title", "value": "restored"}
    return Heatmap(torch.tensor([[0.0, 0.25, -0.5], [1.0, 0.0, 0.0]]), **{**options, **changes})


def test_html_holds_everything_and_asks_for_nothing(tmp_path):
    page = heatmap().save_html(tmp_path / "map.html").read_text()
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=", page)
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    (panel,) = data["panels"]
    assert (data["title"], panel["value"], panel["range"]) == ("a title", "restored", [-1.0, 1.0])
    # Two columns of the same name stay two columns, and no label is read as HTML.
    assert panel["columns"] == [" the", " the", "<b>"] and "<b>" not in page
    assert panel["values"] == [[0.0, 0.25, -0.5], [1.0, 0.0, 0.0]]
    assert [label.get_text() for label in heatmap().drawing().axes[0].get_xticklabels()] == [" the", " the", "<b>"]


def test_png_has_a_size_that_can_be_read(tmp_path):
    picture = heatmap().save_png(tmp_path / "map.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", picture[16:24])
    assert width >= 900
    assert height >= 300
    assert len(set(picture)) > 50  # not one colour


def test_the_same_values_give_the_same_picture_and_others_another(tmp_path):
    one = heatmap().save_png(tmp_path / "one.png").read_bytes()
    assert heatmap().save_png(tmp_path / "two.png").read_bytes() == one
    other = Heatmap(torch.zeros(2, 3), rows=["0", "1"], columns=[" the", " the", "<b>"], title="a title")
    assert other.save_png(tmp_path / "three.png").read_bytes() != one


def test_labels_have_to_fit():
    with pytest.raises(ValueError, match=r"heat map 'a title': got values of shape \[2, 3\], expected \[1, 3\]"):
        heatmap(rows=["0"])

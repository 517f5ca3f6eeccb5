"""What the page of `leanvit serve` asks for, and how it tells where two bundles differ."""

from __future__ import annotations

from typing import Any

import pytest

from node_run import Node


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Node:
    return Node(tmp_path_factory.mktemp("modules"))


def one(label: str, score: float, *box: float) -> dict[str, Any]:
    return {"label": label, "score": score, "box": box}


def labels(**shares: float) -> dict[str, Any]:
    return {"predictions": [{"label": label, "probability": share} for label, share in shares.items()]}


OBJECTS = [one("cat", 0.9, 0, 0, 10, 10), one("cat", 0.8, 20, 0, 30, 10), one("dog", 0.7, 0, 20, 10, 30)]
MOVED = [one("cat", 0.75, 22, 0, 32, 10), one("cat", 0.88, 0, 0, 10, 10), one("cow", 0.7, 0, 20, 10, 30)]
POINTS = [{"score": 1, "box": [0, 0, 9, 9], "keypoints": [[0, 0, 1], [10, 10, 1]]}]
OTHER_POINTS = [{"score": 1, "box": [0, 0, 9, 9], "keypoints": [[3, 4, 1], [10, 11, 1]]}]
MAP = {"shares": {"sky": 1}, "map": {"size": [2, 2], "data": [0, 0, 0, 0]}}
OTHER_MAP = {"shares": {"sky": 0.75, "sea": 0.25}, "map": {"size": [2, 2], "data": [0, 0, 1, 0]}}

APART = "probabilities at most"


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (labels(cat=0.7, dog=0.2), labels(cat=0.6), f"the same first label; {APART} 10.0% apart (cat)"),
        (labels(cat=0.6, dog=0.4), labels(dog=0.6), f"first cat here, dog there; {APART} 20.0% apart (dog)"),
        (labels(cat=0.6), labels(dog=0.6), "first cat here, dog there; no label in common"),
        (labels(), labels(), "the same first label: none; no label in common"),
        (labels(cat=1), labels(cat=1), f"the same first label; {APART} 0.0% apart"),
        ({"objects": OBJECTS}, {"objects": MOVED},
         "2 objects in both, scores at most 0.05 apart; 1 only here, 1 only there"),
        ({"objects": []}, {"objects": OBJECTS}, "0 objects in both; 0 only here, 3 only there"),
        ({"objects": POINTS}, {"objects": OTHER_POINTS}, "keypoints 3.0 pixels apart on average, 5.0 at most"),
        (MAP, OTHER_MAP, "25.0% of the pixels have another class"),
        ({"embedding": [3, 4]}, {"embedding": [4, 3]}, "cosine 0.96000"),
    ],
)  # fmt: skip
def test_the_difference_of_two_bundles_in_words(node: Node, a: Any, b: Any, words: str) -> None:
    code = 'import { difference } from "./differences.js"; tell(difference(...given.values));'
    assert node.run(code, [a, b]) == words


@pytest.mark.parametrize(
    ("options", "drawn", "query"),
    [
        (["top_k"], [], "top_k=3"),
        (["score_threshold"], ["drawn"], "score_threshold=0.25"),
        (["boxes"], ["drawn"], "boxes=1%2C2%2C3%2C4&boxes=5%2C6%2C7%2C8"),
        ([], ["drawn", "map"], "map=true"),
        ([], [], ""),
    ],
)
def test_only_what_the_task_follows_is_asked_for(node: Node, options: list[str], drawn: list[str], query: str) -> None:
    values = {"topK": 3, "scoreThreshold": 0.25, "boxes": [[1, 2, 3, 4], [5, 6, 7, 8]]}
    code = 'import { queryOf } from "./client.js"; tell(queryOf(...given.values));'
    assert node.run(code, [values, {"options": options, "drawn": drawn}]) == query

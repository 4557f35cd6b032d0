"""Merging a role's pod template over the rendered one."""

from typing import Any

import pytest

from kvasir_operator.api.strategic_merge import overlay


@pytest.mark.parametrize(
    ("base", "patch", "merged"),
    [
        ({"a": 1}, {}, {"a": 1}),
        ({"a": 1}, {"a": 2, "b": 3}, {"a": 2, "b": 3}),
        ({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}}, {"a": {"x": 1, "y": 3}}),
        ({"a": {"x": 1}}, {"a": {}}, {"a": {"x": 1}}),
        ({"a": 1}, {"a": {"x": 1}}, {"a": {"x": 1}}),
        ({"a": ["x"]}, {"a": []}, {"a": []}),
        ({"args": ["a", "b"]}, {"args": ["c"]}, {"args": ["c"]}),
        (
            {"tolerations": [{"key": "a"}]},
            {"tolerations": [{"key": "b"}, {"key": "a"}]},
            {"tolerations": [{"key": "a"}, {"key": "b"}]},
        ),
        ({}, {"tolerations": [{"key": "b"}]}, {"tolerations": [{"key": "b"}]}),
        (
            {"containers": [{"name": "kvasir", "image": "a"}]},
            {"containers": [{"name": "log", "image": "b"}, {"name": "kvasir", "image": "c"}]},
            {"containers": [{"name": "kvasir", "image": "c"}, {"name": "log", "image": "b"}]},
        ),
        (
            {"env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}]},
            {"env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]},
            {
                "env": [
                    {"name": "A", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}},
                    {"name": "B", "value": "2"},
                ]
            },
        ),
        (
            {"volumes": [{"name": "cache", "emptyDir": {}}]},
            {"volumes": [{"name": "cache", "persistentVolumeClaim": {"claimName": "c"}}]},
            {"volumes": [{"name": "cache", "persistentVolumeClaim": {"claimName": "c"}}]},
        ),
        (
            {"volumeMounts": [{"name": "cache", "mountPath": "/c"}]},
            {"volumeMounts": [{"name": "other", "mountPath": "/o"}]},
            {"volumeMounts": [{"name": "cache", "mountPath": "/c"}, {"name": "other", "mountPath": "/o"}]},
        ),
    ],
)
def test_merging(base: dict[str, Any], patch: dict[str, Any], merged: dict[str, Any]) -> None:
    before = repr((base, patch))
    assert overlay(base, patch) == merged
    assert repr((base, patch)) == before, "its arguments are not changed"

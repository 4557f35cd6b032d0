"""A pytest plugin for the mutation check: find a failure, report it, don't shrink it; remember nothing."""

from hypothesis import Phase, settings

settings.register_profile(
    "mutation", phases=(Phase.explicit, Phase.generate), database=None, report_multiple_bugs=False
)
settings.load_profile("mutation")

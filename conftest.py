"""pytest -m quick: the tests that need seconds. The others train, or start other processes."""

import re


def pytest_collection_modifyitems(items):
    for item in items:
        if "contract" in item.fixturenames:
            item.add_marker("slow")
        if not item.get_closest_marker("slow"):
            item.add_marker("quick")


def pytest_xdist_make_scheduler(config, log):
    """A method's tests of the contract share runs, so one process has all of them; so have all that
    are run with two processes."""
    from xdist.scheduler import LoadScopeScheduling

    class ByMethod(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            if "two_processes_are_one" in nodeid:
                return "two processes"
            method = re.search(r"::test_contract_\w+\[(\w+)", nodeid)
            return method.group(1) if method else nodeid

    return ByMethod(config, log)

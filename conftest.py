"""pytest -m quick: the tests that need seconds. The others train, or start other processes."""


def pytest_configure(config):
    config.addinivalue_line("markers", "quick: everything but the slow ones")
    config.addinivalue_line("markers", "slow: more than a second")


def pytest_collection_modifyitems(items):
    for item in items:
        if "contract" not in item.fixturenames and not item.get_closest_marker("slow"):
            item.add_marker("quick")

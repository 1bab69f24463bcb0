"""pytest-benchmark's record of the machine also names what decides our numbers."""

from benchmarks.machine import about_this_machine


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info |= about_this_machine()

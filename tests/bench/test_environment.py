"""What stands beside every figure."""

from mixkvq.bench.environment import _command, environment


def test_the_command_is_kept_without_the_file_it_wrote():
    typed = ["bench", "kernel", "--json", "/tmp/a.json", "--cache", "paper:tau_bf16=1, tau_uint4=2"]
    assert _command(typed) == "mixkvq bench kernel --cache 'paper:tau_bf16=1, tau_uint4=2'"
    assert _command(["bench", "prefill", "--json=a.json"]) == "mixkvq bench prefill"


def test_paths_of_the_machine_are_names_of_files():
    typed = ["fidelity", "--text", "/home/me/my text.txt", "--text=../other.txt", "--cache", "recipes/a.json"]
    assert _command(typed) == "mixkvq fidelity --text 'my text.txt' --text=other.txt --cache recipes/a.json"


def test_it_names_machine_versions_and_date():
    assert {"device", "python", "torch", "triton", "transformers", "mixkvq", "date"} <= set(environment())

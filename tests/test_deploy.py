"""The image definition and the compose file, as far as they can be checked where no container can be run."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from consumers.cli import execute
from consumers.layers import load
from streaming.health import Endpoint, Health
from streaming.metrics import Metrics
from tests.test_house import pyproject

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
COMPOSE = DEPLOY / "compose.yaml"


def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]
    return found


OURS = {name: service for name, service in services().items() if "build" in service}


# --- the compose file


def test_the_compose_file_fits_the_specification() -> None:
    checker = Path(sys.executable).with_name("check-jsonschema")
    done = subprocess.run([checker, "--builtin-schema", "vendor.compose-spec", COMPOSE], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_its_processes_are_those_of_the_system() -> None:
    assert {name: service["command"] for name, service in OURS.items()} == {
        "topics": ["topics", "create"],
        "worker": ["worker"],
        "trainer": ["trainer"],
    }
    assert set(services()) == {*OURS, "kafka", "prometheus"}


@pytest.mark.parametrize("name", OURS)
def test_every_command_is_one_that_exists(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Words that the command line does not know are refused before --help is answered."""
    assert execute([*OURS[name]["command"], "--help"]) == 0
    assert execute([*OURS[name]["command"], "--no-such-flag", "--help"]) == 2


@pytest.mark.parametrize("name", OURS)
def test_every_setting_is_one_that_exists_and_agrees_with_the_rest_of_the_file(name: str, tmp_path: Path) -> None:
    settings = load(environ=OURS[name]["environment"], directory=tmp_path).settings
    kind, _, address = settings.broker.partition(":")
    host, _, port = address.partition(":")
    assert kind == "kafka"
    assert f"://{host}:{port}" in services()[host]["environment"]["KAFKA_ADVERTISED_LISTENERS"]
    assert settings.metrics.host == "0.0.0.0"  # noqa: S104 - what is checked
    assert services()["worker"]["deploy"]["replicas"] <= settings.topics.partitions


def test_what_a_service_waits_for_is_there_and_can_come_about() -> None:
    for name, service in services().items():
        for other, how in service.get("depends_on", {}).items():
            needed = services()[other]
            if how["condition"] == "service_healthy":
                assert needed["healthcheck"]["test"], name
            else:
                assert how["condition"] == "service_completed_successfully"
                assert needed["restart"] in {"no", "on-failure"}


def test_every_mounted_file_exists_and_every_volume_is_declared() -> None:
    declared = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["volumes"]
    for service in services().values():
        for mount in service.get("volumes", []):
            source, target, *how = mount.split(":")
            assert target.startswith("/")
            if source.startswith("."):
                assert (DEPLOY / source).is_file(), source
                assert how == ["ro"]
            else:
                assert source in declared


def test_nothing_is_published_beyond_loopback_and_no_image_is_left_to_chance() -> None:
    for name, service in services().items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), name
        assert "privileged" not in service
    assert all(service["image"] == f"coldstream:{pyproject()['project']['version']}" for service in OURS.values())


def test_prometheus_finds_its_rules_and_the_services_that_it_scrapes(tmp_path: Path) -> None:
    prometheus = services()["prometheus"]
    mounted = {mount.split(":")[1]: DEPLOY / mount.split(":")[0] for mount in prometheus["volumes"]}
    (place,) = (flag.partition("=")[2] for flag in prometheus["command"] if flag.startswith("--config.file="))
    config = yaml.safe_load(mounted[place].read_text(encoding="utf-8"))
    for rule_file in config["rule_files"]:
        assert mounted[str(Path(place).parent / rule_file)].name == rule_file
    port = load(environ=OURS["worker"]["environment"], directory=tmp_path).settings.metrics.port
    for job in config["scrape_configs"]:
        (found,) = job["dns_sd_configs"]
        assert [f"coldstream-{name}" for name in found["names"]] == [job["job_name"]]
        assert set(found["names"]) <= set(OURS)
        assert found["port"] == port


def test_the_broker_is_set_as_the_one_that_the_tests_run() -> None:
    environment = services()["kafka"]["environment"]
    lines = (DEPLOY / "kafka" / "server.properties").read_text(encoding="utf-8").splitlines()
    safety = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    for key in ("auto.create.topics.enable", "log.message.timestamp.type", "unclean.leader.election.enable"):
        assert environment[f"KAFKA_{key.upper().replace('.', '_')}"] == safety[key]


# --- the image


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions with their arguments."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


def arguments(instruction: str) -> list[str]:
    return [rest for word, rest in instructions() if word == instruction]


def copied() -> list[tuple[str, str]]:
    """Source and target of everything that the Dockerfile copies from the checkout."""
    pairs = []
    for rest in arguments("COPY"):
        if not rest.startswith("--from="):
            *sources, target = rest.split()
            pairs += [(source, target) for source in sources]
    return pairs


def test_the_dockerfile_uses_instructions_that_exist_and_pinned_bases() -> None:
    known = {"FROM", "RUN", "COPY", "ENV", "USER", "WORKDIR", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"}
    assert {word for word, _ in instructions()} <= known
    assert {rest.split(" AS ")[0] for rest in arguments("FROM")} == {"python:3.11-slim-bookworm"}


def test_what_the_image_copies_exists_and_reaches_the_builder() -> None:
    ignored = [line for line in (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] not in ("", "#")]
    let_in = [pattern[1:] for pattern in ignored if pattern.startswith("!")]
    assert ignored[0] == "*"
    for source, _ in copied():
        assert (ROOT / source).exists(), source
        assert any(fnmatch.fnmatch(source.rstrip("/"), pattern) for pattern in let_in), source
    assert {source.rstrip("/") for source, _ in copied()} == set(let_in)


def test_the_package_builds_from_what_the_image_copies_and_misses_nothing(tmp_path: Path) -> None:
    for source, target in copied():
        place = tmp_path / "src" / target
        if source.endswith("/"):
            shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / source, place)
    install = ["install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", *install, "--target", tmp_path / "made", tmp_path / "src"], check=True, timeout=100)
    for room in pyproject()["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:  # type: ignore[call-overload]
        wanted = {path.relative_to(ROOT) for path in (ROOT / room).rglob("*") if path.is_file() and "__pycache__" not in path.parts}
        made = {path.relative_to(tmp_path / "made") for path in (tmp_path / "made" / room).rglob("*") if path.is_file()}
        assert wanted - made == set()
    assert (tmp_path / "made" / "bin" / "coldstream").is_file()


def test_the_image_runs_as_nobody_special_and_starts_a_worker() -> None:
    last = [index for index, (word, _) in enumerate(instructions()) if word == "FROM"][-1]
    final = instructions()[last:]
    (user,) = (rest for word, rest in final if word == "USER")
    assert int(user) >= 10_000
    assert any(f"--uid {user} " in rest for word, rest in final if word == "RUN")
    assert json.loads(arguments("ENTRYPOINT")[0]) == ["coldstream"]
    assert execute([*json.loads(arguments("CMD")[-1]), "--help"]) == 0


def test_the_health_check_of_the_image_tells_a_healthy_process_from_one_that_is_not(tmp_path: Path) -> None:
    (line,) = arguments("HEALTHCHECK")
    command = json.loads(line[line.index("[") :])
    default = str(load(environ={}, directory=tmp_path).settings.metrics.port)
    assert command[0] == "python"
    assert f":{default}/healthz" in command[2]
    assert arguments("EXPOSE") == [default]
    health = Health()
    with Endpoint(Metrics().registry, health, port=0) as endpoint:
        ask = [sys.executable, "-c", command[2].replace(f":{default}/", f":{endpoint.port}/")]
        assert subprocess.run(ask, capture_output=True, timeout=30).returncode == 0
        health.fail("broken")
        assert subprocess.run(ask, capture_output=True, timeout=30).returncode != 0


def test_the_image_is_made_with_the_tools_of_the_checkout() -> None:
    (wanted,) = re.findall(r"^UV_VERSION := (\S+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert [version for rest in arguments("RUN") for version in re.findall(r"uv==(\S+)", rest)] == [wanted]
    (install,) = (rest for rest in arguments("RUN") if "requirements.lock" in rest)
    assert {"--require-hashes", "--no-deps"} <= set(shlex.split(install))


def pins(path: Path) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", path.read_text(encoding="utf-8"), re.MULTILINE):
        found.setdefault(canonicalize_name(name), set()).add(version)
    return found


def test_the_image_holds_what_was_tested_and_nothing_that_only_tests_need() -> None:
    image, tested = pins(DEPLOY / "requirements.lock"), pins(ROOT / "requirements-dev.lock")
    assert [name for name, versions in image.items() if tested.get(name) != versions] == [], "run `make lock`"
    project = pyproject()
    assert {canonicalize_name(Requirement(line).name) for line in project["project"]["dependencies"]} <= set(image)
    assert not {canonicalize_name(Requirement(line).name) for line in project["dependency-groups"]["dev"]} & (set(image) - {"packaging"})
    text = (DEPLOY / "requirements.lock").read_text(encoding="utf-8")
    assert "://" not in text
    assert [
        package.split()[0] for package in re.split(r"^(?=[a-zA-Z0-9])", text, flags=re.MULTILINE)[1:] if "--hash=sha256:" not in package
    ] == []

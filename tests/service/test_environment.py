"""What engines get of the service's environment."""

import pytest

from loraplex_service.environment import without_secrets


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LORAPLEX_STATE", "postgresql://db/loraplex"),
        ("LORAPLEX_LISTEN", "[::]:50051"),
        ("PGPASSWORD", "x"),
        ("PGPASSFILE", "/run/pgpass"),
        ("AWS_SECRET_ACCESS_KEY", "x"),
        ("GOOGLE_APPLICATION_CREDENTIALS", "/run/key.json"),
        ("GITHUB_TOKEN", "x"),
        ("api_key", "x"),
        ("DATABASE_URL", "mysql://me:x@db/a"),
    ],
)
def test_secrets_are_left_out(name: str, value: str) -> None:
    assert without_secrets({name: value}) == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PATH", "/usr/bin"),
        ("LD_LIBRARY_PATH", "/usr/lib"),
        ("CUDA_VISIBLE_DEVICES", "0"),
        ("OMP_NUM_THREADS", "2"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("LORAPLEX_CPU_KERNELS", "/tmp/kernels"),
        ("HF_TOKEN", "x"),
        ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1"),
        ("HUGGING_FACE_HUB_TOKEN", "x"),
        ("https_proxy", "http://me:x@proxy:3128"),
    ],
)
def test_what_computing_and_fetching_models_takes_is_kept(name: str, value: str) -> None:
    assert without_secrets({name: value}) == {name: value}

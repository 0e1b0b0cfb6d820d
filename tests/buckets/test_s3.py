"""Images and results of a prediction in s3://, against moto's server on the loopback."""

import pytest
from PIL import Image

from oneformer_jax import remote
from oneformer_jax.remote import RemoteError
from tests.eval.tiny_segmenter import Fake, assert_same_result, picture, predict_files

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url():
    pytest.importorskip("s3fs", reason='it comes with pip install "oneformer-jax[s3]"')
    moto = pytest.importorskip("moto.server", reason='it comes with pip install "moto[server]"')
    server = moto.ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "anybody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        import s3fs

        s3fs.S3FileSystem().mkdir("bucket")
        yield "s3://bucket/run"
    server.stop()


def test_pictures_are_predicted_and_results_written(url, tmp_path):
    remote.check(url, writing=True)
    Image.fromarray(picture()).save(tmp_path / "a.png")
    remote.write(f"{url}/images/a.png", (tmp_path / "a.png").read_bytes())
    there = predict_files(Fake(), f"{url}/images", f"{url}/results")
    here = predict_files(Fake(), tmp_path / "a.png", tmp_path / "results")
    assert [path.name for path in there] == [path.name for path in here]
    for one, other in zip(there, here, strict=True):
        assert_same_result(one, other)
    assert len(remote.sizes(remote.path_of(url))) == len(here) + 1


def test_a_bucket_that_is_not_there(url):
    with pytest.raises(
        RemoteError, match="there is no bucket 'nobodys'; make it, or mend its name"
    ):
        remote.check("s3://nobodys/run")

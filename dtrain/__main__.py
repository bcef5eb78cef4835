"""`python -m dtrain`: the environment report, also at torch's name `dtrain.utils.collect_env`.

It owns nothing: `collect_env.main` does the work. `--json` prints the facts for programs.
"""

from __future__ import annotations

from dtrain.utils.collect_env import main

if __name__ == "__main__":
    main()

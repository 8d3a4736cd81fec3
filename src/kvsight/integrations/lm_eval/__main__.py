"""``python -m kvsight.integrations.lm_eval``: lm_eval's own command line, which then knows ``kvsight``.

lm_eval finds models of other packages only when something has imported them first.
"""

from lm_eval.__main__ import cli_evaluate

if __name__ == "__main__":
    cli_evaluate()

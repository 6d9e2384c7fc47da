"""torchrun with its own agent, but with ranks that are copies of this process, which has imported torch already.

    elastic.py RANKS RESTARTS SCRIPT ARGUMENTS
"""
import runpy
import sys
import traceback


from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def run_rank(script, *arguments):
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except Exception:
        traceback.print_exc()  # the agent shows the error of one rank only
        raise



if __name__ == "__main__":
    ranks, restarts, *command = sys.argv[1:]
    agent = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=int(ranks), max_restarts=int(restarts),
                         rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork")
    elastic_launch(agent, run_rank)(*command)

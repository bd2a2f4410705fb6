"""Show by which figures calibration chooses the layers that get a projection.

    python scripts/separation.py smollm2-135m-cpu [KEY=VALUE ...] [--layers N]

Nothing is trained. `share` is the attention that the base's heads pay the first token; the first
layer above 0.1 has the first sink. `separation` is by how much the log-sum-exps of first tokens are
below those of other queries, in standard deviations of the latter, the median over heads. If it is
below 2 in any layer below the first sink, all layers below it get a projection
(`gate.projection_layers=auto`).
"""

import argparse

from retrofit.recipe import load_recipe
from retrofit.training.run import gate_trainer
from retrofit.utils.process import prepare_process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--layers", type=int, help="how many of the first layers; all by default")
    options = parser.parse_intermixed_args()
    calibration = gate_trainer(load_recipe(options.recipe, options.overrides)).calibrate()
    print("| layer | share | separation | projection |")
    print("| --- | --: | --: | --- |")
    for index in sorted(calibration.separations)[: options.layers]:
        share, separation = calibration.first_shares[index].mean(), calibration.separations[index]
        projection = "yes" if index in calibration.projection_layers else ""
        print(f"| {index} | {share:.3f} | {separation:.1f} | {projection} |")


if __name__ == "__main__":
    prepare_process(keep_freed_memory=True)
    main()

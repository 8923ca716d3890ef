"""What commands a federation of an experiment needs, in their order."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from evaluate.experiments.config import SYNTHETIC, Backbone, Experiment, Merge
from evaluate.experiments.jobs import Fold, Job, wire_hub
from evaluate.experiments.orders import arrival_orders, stages
from evaluate.experiments.tables import Union
from finetune.cases import contents_digest, load_unlabelled
from merge_kit.errors import UsageError
from merge_kit.federation import BASE_WEIGHTS
from merge_kit.files import canonical_json, sha256_bytes, sha256_file
from merge_kit.site import PUBLIC_KEY_FILE
from merge_kit.trust import default_key

FIRST = "first"
UNCALIBRATED = "-uncalibrated"
PERSONAL = "-personal"
"""Ends the name of a merge that every site has made its own."""
SITES = "sites"
"""Where norm statistics are measured again: by the sites."""
POOLED = "pooled"


class Planner:
    """Writes down the commands of one fold."""

    def __init__(self, experiment: Experiment, here: Path, union: Union, fold: Fold) -> None:
        self._told, self._union, self.fold = experiment, union, fold
        self._hub = wire_hub(fold.root, "")
        self._sites = [name for name in union.sites if name != fold.left_out]
        self._here = here
        self._joined: list[Job] = []
        self._published: dict[str, list[Job]] = {"": []}
        """The jobs that put the vectors on a hub, by their compression."""

    def plan(self) -> Fold:
        """All commands but the evaluation."""
        measured = self._start()
        before = [*measured, *self._teacher()]
        if self.fold.variant is None:
            first = self._model(FIRST, {})
            self.fold.add("head", self._hub, "--out", first, "--replace", after=measured)
            self.fold.models[FIRST] = first
        for site in self._sites:
            tuned = self.fold.add(
                "finetune", self._site(site), *self._images(site), *self._training(), after=before
            )
            self._published[""].append(self.fold.add("publish", self._site(site), after=[tuned]))
        wanted = self._told.merges if self.fold.left_out is None else self._told.unseen
        for name in wanted:
            self._merge(name, name, self._sites)
            if self.fold.whole and name in self._told.personal:
                self._personalise(name, self.fold.jobs[-1])
        if self.fold.whole:
            self._baselines(measured)
            if self._told.arrivals and self.fold.seed == self._told.seeds[0]:
                self._arrivals(self._told.arrivals.merge, self._told.arrivals.orders)
        return self.fold

    def _start(self) -> list[Job]:
        """Hub and sites; gives the jobs after which the base has been calibrated by all."""
        created = self._init(self._hub)
        self._joined = [
            self.fold.add(
                "join", self._hub, "--site", site, "--folder", self._site(site), after=[created]
            )
            for site in self._sites
        ]
        admitted = self._admit(self._hub, created)
        return [
            self.fold.add(
                "calibrate",
                self._site(site),
                *self._images(site),
                *self._means(),
                "--publish",
                after=[admitted],
            )
            for site in self._sites
        ]

    def _teacher(self) -> list[Job]:
        """The private teachers' first weights, where sites have any."""
        self.fold.teacher = self._told.training_of(self.fold.variant).get("mutual")
        return [] if self.fold.teacher is None else [self._other(self.fold.teacher)]

    def _other(self, name: str) -> Job:
        """First weights of another backbone; the same command is one job."""
        return self._init(self._other_folder(name), base=self._told.others[name])

    def _other_folder(self, name: str) -> Path:
        return self.fold.root / f"other-{name}"

    def _other_model(self, name: str) -> Path:
        return (self._other_folder(name) / BASE_WEIGHTS).parent

    def _init(
        self,
        hub: Path,
        *more: object,
        base: Backbone | None = None,
        after: Sequence[Job] = (),
    ) -> Job:
        base = base or self._told.backbone
        weights = ("--weights", self._here / base.weights) if base.weights else ()
        return self.fold.add(
            "init",
            hub,
            "--backbone",
            base.name,
            *weights,
            "--classes",
            ",".join(self._union.classes),
            *shlex.split(base.init),
            *more,
            after=after,
        )

    def _admit(self, hub: Path, created: Job, *more: object) -> Job:
        """All sites, one after the other, as each writes the federation's file; the last one."""
        done = created
        for site, joined in zip(self._sites, self._joined, strict=True):
            key = self._site(site) / PUBLIC_KEY_FILE
            done = self.fold.add("admit", hub, site, key, *more, after=[joined, done])
        return done

    def _another_hub(self, wire: str) -> tuple[Path, Job]:
        """The same contract at another place, where vectors of the same runs may lie; and the job
        after which all sites are admitted."""
        hub, key = wire_hub(self.fold.root, wire), ("--key", default_key(self._hub))
        created = self._init(hub, "--name", self._hub.name, *key, after=[self.fold.jobs[0]])
        return hub, self._admit(hub, created, *key)

    def _wire(self, how: str) -> tuple[Path, list[Job]]:
        """The hub with the vectors as they travel, and the jobs after which they lie there."""
        hub = wire_hub(self.fold.root, how)
        if how not in self._published:
            hub, admitted = self._another_hub(how)
            # A run's folder holds the manifest of what was published last: one after the other.
            before = list(self._published.values())[-1]
            self._published[how] = [
                self.fold.add(
                    "publish",
                    self._site(site),
                    "--hub",
                    hub,
                    "--compress",
                    how,
                    after=[admitted, earlier],
                )
                for site, earlier in zip(self._sites, before, strict=True)
            ]
        return hub, self._published[how]

    def _spoken(self, merge: Merge) -> tuple[Path, list[Job]]:
        """The hub with the vectors of some sites and what private models of the others say, and the
        jobs after which they lie there."""
        if odd := sorted(set(merge.private) - set(self._union.sites)):
            raise UsageError(
                f"'private: {odd[0]}' is none of the sites: {', '.join(self._union.sites)}."
            )
        hub, admitted = self._another_hub(merge.wire)
        before = dict(zip(self._sites, list(self._published.values())[-1], strict=True))
        done = []
        for site in self._sites:
            if site not in merge.private:
                after = [admitted, before[site]]
                done.append(self.fold.add("publish", self._site(site), "--hub", hub, after=after))
                continue
            other = merge.private[site]
            folder, trained = self._elsewhere(site, other)
            said = ("--model", folder, *self._transfer(merge.transfer), "--publish", "--hub", hub)
            after = [admitted, trained]
            about = self._content(merge)
            done.append(
                self.fold.add("predict-proxy", self._site(site), *said, after=after, about=about)
            )
        return hub, done

    def _elsewhere(self, site: str, other: str) -> tuple[Path, Job]:
        """A site's model of another backbone, trained alone, and the job that trains it."""
        name = f"{site}-{other}"
        folder = self.fold.root / "alone" / name
        joined = self.fold.add(
            "join", self._other_folder(other), "--site", site, "--folder", folder,
            after=[self._other(other)],
        )  # fmt: skip
        trained = self.fold.add(
            "finetune", folder, *self._images(site), *self._training(head="own", mutual=None),
            after=[joined],
        )  # fmt: skip
        self.fold.models[name] = folder
        return folder, trained

    def _merge(self, name: str, choice: str, sites: Sequence[str], chosen: bool = False) -> None:
        """Merge the vectors of some sites and, if it is asked for, repair what merging breaks."""
        merge = self._told.merges[choice]
        only = [part for site in sites for part in ("--site", site)] if chosen else []
        hub, published = self._spoken(merge) if merge.private else self._wire(merge.compress)
        student: tuple[object, ...] = ()
        if merge.student:
            published = [*published, self._other(merge.student)]
            student = ("--student", self._other_model(merge.student))
        told = merge.model_dump(mode="json", exclude_defaults=True)
        options: Sequence[object] = shlex.split(merge.options)
        if merge.tune:
            recipe = self.fold.root / "recipes" / f"{self._model(name, told).name}.yaml"
            published = [self._tune(hub, merge, only, recipe, published)]
            options = ("--recipe", recipe)
        plain = self._model(f"{name}{UNCALIBRATED}" if merge.calibrate else name, told)
        model = self._model(f"{name}-merged", told) if merge.restore else plain
        done = self.fold.add(
            "merge",
            hub,
            *options,
            *self._transfer(merge.transfer),
            *student,
            *only,
            "--out",
            model,
            "--replace",
            after=published,
            about=self._content(merge),
        )
        if merge.restore:
            done = self._restore(merge.restore, model, plain, sites, only, done, hub)
        if not merge.calibrate:
            self.fold.models[name] = plain
            return
        if not chosen:
            self.fold.models[f"{name}{UNCALIBRATED}"] = plain
        out = self._model(name, told)
        self.fold.add(
            "head",
            hub,
            plain,
            *only,
            *shlex.split(merge.head),
            "--out",
            out,
            "--replace",
            after=self._visits(sites, plain, [done], hub),
        )
        self.fold.models[name] = out

    def _personalise(self, name: str, merged: Job) -> None:
        """Every site makes a merged model its own; nothing of that leaves it."""
        told = self._told.merges[name].model_dump(mode="json", exclude_defaults=True)
        own = f"{name}{PERSONAL}"
        self.fold.models[own] = self._model(own, told)
        for site in self._sites:
            self.fold.add(
                "personalise",
                self._site(site),
                *self._images(site),
                "--model",
                self.fold.models[name],
                "--out",
                self.fold.models[own] / site,
                after=[merged],
            )

    def _tune(
        self, hub: Path, merge: Merge, only: Sequence[str], recipe: Path, published: Sequence[Job]
    ) -> Job:
        """Learn on images how much each site counts in each block."""
        return self.fold.add(
            "tune",
            hub,
            *self._images(),
            *shlex.split(merge.options),
            *shlex.split(merge.tune),
            *only,
            "--out-recipe",
            recipe,
            "--replace",
            after=published,
            about=self._content(merge),
        )

    def _means(self) -> tuple[object, ...]:
        return () if self._told.means is None else ("--means", self._told.means)

    def _transfer(self, whose: str) -> tuple[object, ...]:
        """The images that a student learns from, where they are not synthesised."""
        if whose in ("", SYNTHETIC):
            return ()
        if "=" in whose:
            return (*self._images(), "--where", whose, "--split", "train")
        return ("--data", self._here / whose)

    def _content(self, merge: Merge) -> str:
        """Of files that a merge reads: a recipe, other images. The table is a part of the fold's
        own name."""
        words = shlex.split(merge.options)
        files = [Path(word) for word in words if "/" in word or word.endswith(".yaml")]
        found = [sha256_file(file) for file in files if file.is_file()]
        if merge.transfer not in ("", SYNTHETIC) and "=" not in merge.transfer:
            found.append(contents_digest(load_unlabelled(self._here / merge.transfer)))
        return " ".join(found)

    def _visits(
        self, sites: Sequence[str], model: Path, after: Sequence[Job], hub: Path, *more: str
    ) -> list[Job]:
        """Every site measures a merged model."""
        there = ("--hub", hub) if hub != self._hub else ()
        return [
            self.fold.add(
                "calibrate",
                self._site(site),
                *self._images(site),
                "--model",
                model,
                *(more or self._means()),
                "--publish",
                *there,
                after=after,
            )
            for site in sites
        ]

    def _restore(
        self,
        whose: str,
        model: Path,
        out: Path,
        sites: Sequence[str],
        only: Sequence[str],
        done: Job,
        hub: Path,
    ) -> Job:
        """The merged model with norm statistics that are measured again."""
        if whose == SITES:
            measured = self._visits(sites, model, [done], hub, "--norms")
            how: tuple[object, ...] = ("--hub", hub, *only)
        else:
            measured = [done]
            how = (*self._images(), "--where", whose, "--split", "train")
        return self.fold.add("restore", model, *how, "--out", out, "--replace", after=measured)

    def _baselines(self, measured: Sequence[Job]) -> None:
        # Without a private teacher: what there would be without the federation, and in rounds.
        alone = self._training(head="own", mutual=None)
        if "single" in self._told.baselines:
            for site in self._sites:
                self._alone(site, self._images(site), alone)
        if "pooled" in self._told.baselines:
            options = self._told.options()
            steps = {} if options.epochs else {"steps": options.steps * len(self._sites)}
            self._alone(POOLED, self._images(), self._training(head="own", mutual=None, **steps))
        for strategy in self._told.strategies:
            out = self._model(strategy, {"rounds": self._told.rounds})
            self.fold.add(
                "rounds",
                *[self._site(site) for site in self._sites],
                *self._images(),
                "--strategy",
                strategy,
                "--rounds",
                self._told.rounds,
                *self._training(mutual=None),
                "--out",
                out,
                "--replace",
                after=measured,
            )
            self.fold.models[strategy] = out

    def _alone(self, name: str, images: Sequence[object], training: Sequence[object]) -> None:
        """A model that owes nothing to the federation: trained in a folder of its own."""
        folder = self.fold.root / "alone" / name
        joined = self.fold.add(
            "join", self._hub, "--site", name, "--folder", folder, after=self.fold.jobs[:1]
        )
        self.fold.add("finetune", folder, *images, *training, after=[joined])
        self.fold.models[name] = folder

    def _arrivals(self, merge: str, orders: int) -> None:
        """Models of the sites that are there after each arrival and each withdrawal."""
        for order in arrival_orders(self._sites, orders):
            for there in stages(order):
                members = frozenset(there)
                if members in self.fold.arrivals:
                    continue
                if members == frozenset(self._sites):
                    self.fold.arrivals[members] = merge
                    continue
                name = "arrived-" + "-".join(str(self._sites.index(s) + 1) for s in sorted(there))
                self._merge(name, merge, sorted(there), chosen=True)
                self.fold.arrivals[members] = name

    def _images(self, site: str | None = None) -> tuple[object, ...]:
        only = ("--where", f"site={site}") if site else ()
        return ("--data", self._union.path, "--images", self._union.images, *only)

    def _training(self, **changes: object) -> tuple[object, ...]:
        told = self._told.training_of(self.fold.variant)
        if self.fold.teacher:
            told = {**told, "mutual": self._other_model(self.fold.teacher)}
        chosen = {**told, "seed": self.fold.seed, **changes}
        if chosen.get("mutual") is None:
            chosen.pop("mutual", None)
        return tuple(
            part for k, v in sorted(chosen.items()) for part in (f"--{k.replace('_', '-')}", v)
        )

    def _site(self, name: str) -> Path:
        return self.fold.root / "sites" / name

    def _model(self, name: str, told: Mapping[str, object]) -> Path:
        """A folder that no other choice under the same name has."""
        return self.fold.root / "models" / f"{name}-{sha256_bytes(canonical_json(told))[7:15]}"

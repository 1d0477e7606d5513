"""The steps of a migration that change who may open the guest's network volumes; when, says volumes.py."""

from collections.abc import Iterable, Mapping
from functools import partial

from handoff.agent.v1.types_pb2 import Disk
from handoff.controller.v1.migrations_pb2 import MigrationKind
from handoff_common.errors import PreconditionError
from handoff_controller.agents import Agent
from handoff_controller.journey import Journey, StepFailed
from handoff_controller.machine import State, state_of
from handoff_controller.reconcile import ACTIVE
from handoff_controller.volumes import Volumes, check_unchanged, label, network_volumes

GRANT_PATIENCE_S = 15.0
REVOKE_PATIENCE_S = 30.0
OTHERS_PATIENCE_S = 5.0


class VolumeSteps:
    """GRANT_VOLUMES and REVOKE_VOLUMES of one migration."""

    def __init__(self, way: Journey, volumes: Volumes) -> None:
        self._way = way
        self._volumes = volumes

    async def _of_others(self, agent: Agent) -> Mapping[str, str]:
        """Who else runs on which volume there, by label; nobody where its agent does not answer."""
        if not self._way.migration.volumes:
            return {}
        try:
            domains = await self._way.insist(agent.list_domains, OTHERS_PATIENCE_S, also_refusals=True)
        except StepFailed:
            return {}
        return {
            label(volume): domain.name
            for domain in domains
            if domain.uuid != self._way.migration.guest_uuid and domain.state in ACTIVE
            for volume in network_volumes(domain.disks)
        }

    async def grant(self, disks: Iterable[Disk]) -> None:
        """Lets the destination in. `disks`: the guest's, as they are now. Raises StepFailed."""
        migration = self._way.migration
        if migration.kind == MigrationKind.MIGRATION_KIND_UPGRADE:
            return  # the host has access already
        try:
            check_unchanged(migration.guest_name, migration.volumes, network_volumes(disks))
        except PreconditionError as error:
            raise StepFailed(error.message) from error
        for volume in migration.volumes:
            await self._way.insist(
                partial(self._volumes.grant, volume, self._way.at_destination, migration.revision), GRANT_PATIENCE_S
            )

    async def revoke(self) -> None:
        """Shuts the host out that does not have the guest in the end, also where its agent does not answer.

        A volume that another guest of that host runs on stays open to it.
        """
        has_moved = state_of(self._way.migration) is State.FINISHING
        host = self._way.at_source if has_moved else self._way.at_destination
        others = await self._of_others(self._way.source if has_moved else self._way.destination)
        for volume in self._way.migration.volumes:
            if label(volume) in others:
                self._way.log.info("volume stays open", volume=label(volume), host=host, other=others[label(volume)])
                continue
            call = partial(self._volumes.revoke, volume, host, self._way.migration.revision)
            try:
                await self._way.insist(call, REVOKE_PATIENCE_S, also_refusals=True)
            except StepFailed as failure:
                self._way.warn(f"{failure}. Take {label(volume)} from {host} by hand")

"""The SFTP server's program, run where asyncssh is: ``python sftp_program.py HOST USER PASSWORD PORT FOLDER``."""

from __future__ import annotations

import asyncio
import os
import sys

__all__: list[str] = []


async def serve(host: str, user: str, password: str, port: int, folder: str) -> None:
    """Serve *folder* as the root, until killed."""
    import asyncssh

    class Login(asyncssh.SSHServer):  # type: ignore[misc]
        """Lets one user in."""

        def password_auth_supported(self) -> bool:
            return True

        def validate_password(self, username: str, given: str) -> bool:
            return (username, given) == (user, password)

    server = await asyncssh.listen(
        host,
        port,
        server_factory=Login,
        server_host_keys=[asyncssh.generate_private_key("ssh-ed25519")],
        sftp_factory=lambda channel: asyncssh.SFTPServer(channel, chroot=os.fsencode(folder)),
    )
    await server.wait_closed()


if __name__ == "__main__":
    _host, _user, _password, _port, _folder = sys.argv[1:]
    asyncio.run(serve(_host, _user, _password, int(_port), _folder))

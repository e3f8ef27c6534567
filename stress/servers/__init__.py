"""Real stores as processes of their own on loopback: for tests, benchmarks and the demo.

``install`` puts them into a folder, ``process`` runs one of them, and ``seaweedfs``, ``fake_gcs``, ``azurite``,
``juicefs`` and ``folders`` (SFTP, FTP, WebDAV) know how each is started. What is tested or measured *with* them
belongs elsewhere.
"""

"""What the tests share: certificates, a real daemon as a subprocess, peers, and waiting with deadlines."""

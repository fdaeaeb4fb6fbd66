"""What the image adds to tritonserver: a guarded start, probes that run an inference, and draining.

    python3 -m docker.entrypoint serve /models      process 1 of the container
    python3 -m docker.entrypoint probe live         exit status 0 or 1 and a sentence
    python3 -m docker.entrypoint drain              to be run before the container is stopped

Imports only the standard library and `server`: a probe runs every few seconds, and the image
carries nothing that serving does not need.
"""

"""A transfer backend of the embedded engine that flips one bit of some hand-overs on the wire.

--disaggregation-transfer-backend pdkit.engine.corruption:BitFlip
"""

from pdkit.engine.transfer import Handover, TransferBackend

# Prompts of these lengths are hit, at this share of the bytes of their hand-over.
BIT_FLIPS = {211: 0.0, 212: 0.5, 213: 1.0}


class BitFlip(TransferBackend):
    """Flips a bit of the hand-over of a prompt whose length is in BIT_FLIPS; every other one arrives as it was sent."""

    def wire(self, data):
        share = BIT_FLIPS.get(Handover.unpack(data).prompt_tokens)
        if share is None:
            return data
        place = round(share * (len(data) - 1))
        return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]

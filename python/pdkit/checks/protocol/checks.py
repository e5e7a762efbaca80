"""All that clients of prefill and decode meet."""

from pdkit.checks.protocol.answers import AnswerChecks
from pdkit.checks.protocol.leaving import LeavingChecks
from pdkit.checks.protocol.load import LoadChecks
from pdkit.checks.protocol.operation import OperationChecks
from pdkit.checks.protocol.reference import counting_prompts, question_prompts
from pdkit.checks.protocol.refusals import RefusalChecks


class ProtocolChecks(AnswerChecks, RefusalChecks, LeavingChecks, LoadChecks, OperationChecks):
    """Each scenario once through each load balancer."""

    needs: tuple[str, ...] = ("gsm8k_data_path",)

    @classmethod
    def prompts(cls, count: int) -> list[str]:
        """Questions, where the deployment has a file of them: a model of its own goes on with what it was trained on."""
        return question_prompts(cls.gsm8k_data_path, count) if cls.gsm8k_data_path else counting_prompts(count)

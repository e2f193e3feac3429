"""Conversations in LLaVA's formats: records, their faults, and data sets of them."""

from collavo.conversations.dataset import ConversationDataset
from collavo.conversations.records import check_record, record_images

__all__ = ["ConversationDataset", "check_record", "record_images"]

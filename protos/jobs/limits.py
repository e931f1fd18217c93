"""Limits of the job service. Clients check them before they send, the head when it receives."""

MAX_REQUEST_BYTES = 64 << 20  # of one message, either way
MAX_DOCUMENT_BYTES = 16 << 30  # of any document; a head has a smaller limit of its own
MAX_QUESTIONS = 1024
MAX_TOKEN_IDS = 1 << 22  # of a prompt; more than any context
MAX_MESSAGES = 4096  # of a chat
MAX_TOOLS = 512  # of a chat
MAX_TOOL_CALLS = 512  # of a message
MAX_SCHEMA_CHARS = 1 << 20  # of the parameters of a tool
MAX_STOPS = 64  # strings and ids each
MAX_LABELS = 32
MAX_CHARS = 256  # of a label, a stop string, an idempotency key, an id, a cursor, the name of a document
MAX_CONSTRAINT_CHARS = 1 << 18  # of a JSON schema, a regular expression, a list of choices or a grammar
MAX_LOGIT_BIAS = 1024  # tokens with a bias of their own
MAX_SCORED_TOKENS = 32768  # of a prompt, with log-probabilities of its own
MAX_LOGPROBS = 100  # tokens with their log-probability beside the sampled one
MAX_DEADLINE_S = 30 * 86400.0
MAX_WAIT_S = 3600.0  # of one call
MAX_PAGE = 1000  # jobs of one listing
MAX_UINT32 = (1 << 32) - 1  # of a token id or a count: what their fields hold
MAX_INT32 = (1 << 31) - 1
MAX_INT64 = (1 << 63) - 1  # of a seed or a token's number: what the store holds

-- The tables of a crossdock store, version 1.
--
-- A message is one row of `message`, which holds its body and is written once, and one row in exactly one of `ready`, `scheduled`,
-- `leased` and `dead`: its state. Changing state moves a row of a few small numbers; the body stays where it is.
-- Every instant is in milliseconds since the Unix epoch.

-- The store itself; one row.
CREATE TABLE store (
    receivers INTEGER NOT NULL              -- how many Brokers have received from it; each marks its leases with its own number
);
INSERT INTO store VALUES (0);

-- A queue of one namespace, with what was declared of it and what is in it. An id may be remembered until another connection commits.
CREATE TABLE queue (
    id              INTEGER PRIMARY KEY,
    namespace       TEXT NOT NULL,
    name            TEXT NOT NULL,
    lease_ms        INTEGER NOT NULL,
    max_ready       INTEGER,                -- NULL: no limit; so below
    dead_max_age_ms INTEGER,
    dead_max_count  INTEGER,
    dead_dropped    INTEGER NOT NULL DEFAULT 0,     -- letters that retention removed, since the queue exists
    ready           INTEGER NOT NULL DEFAULT 0,     -- how many messages are in each state; kept by the triggers below
    scheduled       INTEGER NOT NULL DEFAULT 0,
    leased          INTEGER NOT NULL DEFAULT 0,
    dead            INTEGER NOT NULL DEFAULT 0,
    UNIQUE (namespace, name)
);

-- What was enqueued.
CREATE TABLE message (
    key        INTEGER PRIMARY KEY,         -- its place in line: when it gets there, higher than all others; a retry gets a new one
    queue      INTEGER NOT NULL,
    id         TEXT NOT NULL,
    generation INTEGER NOT NULL,
    priority   INTEGER NOT NULL,
    body       BLOB NOT NULL
);
CREATE UNIQUE INDEX message_by_id ON message (id, queue);  -- core's ids grow with time, so this way round it grows at its end

-- READY: waiting for a worker. Found by the message's own row, so it needs no index beside its order.
CREATE TABLE ready (
    queue      INTEGER NOT NULL,
    priority   INTEGER NOT NULL,
    message    INTEGER NOT NULL,            -- message.key, in all four
    since_ms   INTEGER NOT NULL,            -- when it became due
    deliveries INTEGER NOT NULL,            -- hand-overs since it was stored, less those given back; so below
    fence      INTEGER NOT NULL,            -- of the lease that expired and brought it here, whose holder may still settle; else 0
    PRIMARY KEY (queue, priority, message)
) WITHOUT ROWID;

-- SCHEDULED: waiting for its time.
CREATE TABLE scheduled (
    message    INTEGER PRIMARY KEY,
    queue      INTEGER NOT NULL,
    due_ms     INTEGER NOT NULL,
    deliveries INTEGER NOT NULL
);
CREATE INDEX scheduled_by_due ON scheduled (queue, due_ms, message);

-- LEASED: handed over to a worker and not settled.
CREATE TABLE leased (
    message    INTEGER PRIMARY KEY,
    queue      INTEGER NOT NULL,
    until_ms   INTEGER NOT NULL,
    fence      INTEGER NOT NULL,            -- of the receive that took it; no other receive ever has the same
    since_ms   INTEGER NOT NULL,            -- as it was in `ready`, should it go back there
    deliveries INTEGER NOT NULL
);
CREATE INDEX leased_by_end ON leased (queue, until_ms, message);

-- DEAD: given up, with the letter that core wrote.
CREATE TABLE dead (
    message     INTEGER PRIMARY KEY,
    queue       INTEGER NOT NULL,
    died_ms     INTEGER NOT NULL,
    id          TEXT NOT NULL,
    deliveries  INTEGER NOT NULL,
    reason      TEXT NOT NULL,
    task        TEXT NOT NULL,
    error_type  TEXT NOT NULL,
    fingerprint TEXT NOT NULL,
    story       BLOB NOT NULL
);
CREATE INDEX dead_by_time ON dead (queue, died_ms, id);

-- Counting at each move makes figures, limits and retention cost the same whatever is stored.
CREATE TRIGGER ready_in AFTER INSERT ON ready BEGIN UPDATE queue SET ready = ready + 1 WHERE id = new.queue; END;
CREATE TRIGGER ready_out AFTER DELETE ON ready BEGIN UPDATE queue SET ready = ready - 1 WHERE id = old.queue; END;
CREATE TRIGGER scheduled_in AFTER INSERT ON scheduled BEGIN UPDATE queue SET scheduled = scheduled + 1 WHERE id = new.queue; END;
CREATE TRIGGER scheduled_out AFTER DELETE ON scheduled BEGIN UPDATE queue SET scheduled = scheduled - 1 WHERE id = old.queue; END;
CREATE TRIGGER leased_in AFTER INSERT ON leased BEGIN UPDATE queue SET leased = leased + 1 WHERE id = new.queue; END;
CREATE TRIGGER leased_out AFTER DELETE ON leased BEGIN UPDATE queue SET leased = leased - 1 WHERE id = old.queue; END;
CREATE TRIGGER dead_in AFTER INSERT ON dead BEGIN UPDATE queue SET dead = dead + 1 WHERE id = new.queue; END;
CREATE TRIGGER dead_out AFTER DELETE ON dead BEGIN UPDATE queue SET dead = dead - 1 WHERE id = old.queue; END;

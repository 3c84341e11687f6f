-- Where a message is and where it goes: for the scripts that look and repair.

local function generation_of(value) return (struct.unpack('>I4', value, 5)) end
local function since_of(value) return (struct.unpack('>I8', value, 9)) end

-- Before a look: lets time have its effect, a bounded piece of it. Returns whether there is more to do; then ask again.
local function catch_up(P)
  local fresh = {}
  local promoted, more = promote(P, BATCH, fresh), reap(P, fresh)
  for level in pairs(fresh) do wake(P, level) end
  return retain(P) or promoted == BATCH or more
end

local function ready_count(P)
  return redis.call('LLEN', P .. 'r9') + redis.call('LLEN', P .. 'r6') + redis.call('LLEN', P .. 'r3')
    + redis.call('LLEN', P .. 'r0') - redis.call('HLEN', P .. 'gh')
end

-- A removed id stays in its ready list as a ghost. When the id comes back, its ghost gets a name of its own, so that no id is
-- listed twice and every other entry keeps its place.
local function rename_ghost(P, id)
  local level = redis.call('HGET', P .. 'gh', id)
  if not level then return end
  redis.call('HDEL', P .. 'gh', id)
  local index = redis.call('LPOS', P .. 'r' .. level, id)
  if index then
    local name = '~' .. redis.call('HINCRBY', P .. 'q', 'ghosts', 1)
    redis.call('LSET', P .. 'r' .. level, index, name)
    redis.call('HSET', P .. 'gh', name, level)
  end
end

-- Makes a message SCHEDULED or READY that is in no state. `due`: 0 now, > 0 that instant, < 0 so many milliseconds from now.
local function store(P, id, value, due)
  if due < 0 then
    due = now - due
    value = due_at(value, due)
  end
  redis.call('HSET', P .. 'b', id, value)
  local level = level_of(value)
  if due <= now then
    redis.call('RPUSH', P .. 'r' .. level, id)
    wake(P, level)
  else
    local first = redis.call('ZRANGE', P .. 's', 0, 0, 'WITHSCORES')
    redis.call('ZADD', P .. 's', due, level .. id)
    if not first[2] or due < tonumber(first[2]) then wake(P, level) end
  end
end

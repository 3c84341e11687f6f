-- What time does to a queue: for the scripts that deliver, look and repair.

local function lost_once_more(value)
  local count = math.min(struct.unpack('>I2', value, 3) + 1, 65535)
  return string.sub(value, 1, 2) .. struct.pack('>I2', count) .. string.sub(value, 5)
end

-- `h<level>` counts what left the head of a ready list, less what came back there: it turns an index into a place that stays.
local function push_head(P, level, ids)      -- the first of `ids` becomes the head
  local reversed = {}
  for i = #ids, 1, -1 do reversed[#reversed + 1] = ids[i] end
  redis.call('LPUSH', P .. 'r' .. level, unpack(reversed))
  redis.call('HINCRBY', P .. 'q', 'h' .. level, -#ids)
end

-- Moves up to `most` due messages from the schedule to the ready lists, the earliest first. Returns how many.
local function promote(P, most, fresh)
  local due = redis.call('ZRANGEBYSCORE', P .. 's', '-inf', now, 'LIMIT', 0, most)
  if #due == 0 then return 0 end
  redis.call('ZREM', P .. 's', unpack(due))
  local levels = {}
  for _, member in ipairs(due) do
    local level = string.sub(member, 1, 1)
    local ids = levels[level]
    if not ids then ids = {} levels[level] = ids end
    ids[#ids + 1] = string.sub(member, 2)
  end
  for level, ids in pairs(levels) do
    redis.call('RPUSH', P .. 'r' .. level, unpack(ids))
    fresh[level] = true
  end
  return #due
end

-- A batch has one deadline in `x`, under its own name, until a part of it is extended: then each of its ids has one, `<batch>~<id>`.
-- Returns the batch of a member of `x`, and the one id that it stands for, if any.
local function batch_of(member)
  local at = string.find(member, '~', 1, true)
  if not at then return member, nil end
  return string.sub(member, 1, at - 1), string.sub(member, at + 1)
end

-- Takes back what is leased beyond its deadline, BATCH ids and a batch more at most: to the heads of their lists, in order of their
-- ids, with one more loss counted. Returns whether there may be more.
local function reap(P, fresh)
  local over = redis.call('ZRANGEBYSCORE', P .. 'x', '-inf', now, 'LIMIT', 0, 100)
  local ids, taken = {}, 0
  for i, member in ipairs(over) do
    local batch, id = batch_of(member)
    local group = P .. 'g' .. batch
    if id then
      if redis.call('SREM', group, id) == 1 then ids[#ids + 1] = id end
      redis.call('ZREM', P .. 'x', member)
    else
      local all = redis.call('SMEMBERS', group)
      if #all == 0 then
        -- Batch and deadline go together, so the set is elsewhere: this slot is being moved to another node. Not lost, but later.
        redis.call('ZADD', P .. 'x', now + 1000, member)
      else
        for _, each in ipairs(all) do ids[#ids + 1] = each end
        redis.call('UNLINK', group)
        redis.call('ZREM', P .. 'x', member)
      end
    end
    taken = i
    if #ids >= BATCH then break end
  end
  if #ids == 0 then return #over == 100 end
  table.sort(ids)
  for first = 1, #ids, BATCH do
    local last = math.min(first + BATCH - 1, #ids)
    redis.call('SREM', P .. 'l', unpack(ids, first, last))
    local levels, changed = {}, {}
    for i, value in ipairs(redis.call('HMGET', P .. 'b', unpack(ids, first, last))) do
      local id, level = ids[first + i - 1], level_of(value)
      if not levels[level] then levels[level] = {} end
      table.insert(levels[level], id)
      changed[#changed + 1] = id
      changed[#changed + 1] = lost_once_more(value)
    end
    redis.call('HSET', P .. 'b', unpack(changed))
    for level, mine in pairs(levels) do
      push_head(P, level, mine)
      fresh[level] = true
    end
  end
  return taken < #over or #over == 100
end

-- Drops up to BATCH letters each that are too old and too many, the oldest first, and counts them. Returns whether there may be more.
local function retain(P)
  local limits = redis.call('HMGET', P .. 'q', 'dead_max_age_ms', 'dead_max_count')
  local function drop(doomed)
    if #doomed > 0 then
      redis.call('ZREM', P .. 'd', unpack(doomed))
      redis.call('HDEL', P .. 'b', unpack(doomed))
      redis.call('HINCRBY', P .. 'q', 'dropped', #doomed)
    end
    return #doomed == BATCH
  end
  local more = false
  if limits[1] then
    more = drop(redis.call('ZRANGEBYSCORE', P .. 'd', '-inf', '(' .. (now - limits[1]), 'LIMIT', 0, BATCH))
  end
  if limits[2] then
    local excess = math.min(redis.call('ZCARD', P .. 'd') - limits[2], BATCH)
    if excess > 0 then more = drop(redis.call('ZRANGE', P .. 'd', 0, excess - 1)) or more end
  end
  return more
end

-- Ends deliveries and receives new ones, in one step for one or more queues.
--
-- KEYS         prefixes of the queues
-- ARGV[1]      token of the request, 12 characters: it names the batch of leases that this receive takes
-- ARGV[2]      most messages to receive; 0: none
-- ARGV[3]      MessagePack: flat list of lanes in order, each three numbers: queue (index from 1), level, quota
-- ARGV[4]      MessagePack: flat list of queue and level of each token that may have woken this receiver
-- ARGV[5]      2: take what quotas leave over in a second pass; 1: do not
-- ARGV[6]      1: see to what is due, or leased for too long, in every queue; 0: only where more than one message is asked for
-- ARGV[7]      how many lanes are told apart from those of ARGV[3], and come before them: asked for one message, and probably idle
-- then         the names of their lists, and MessagePack: flat list of queue and level of each
-- then         number of groups of acks, then per group: queue, batch, how many, ids
-- then         per other ending: kind, queue, batch, id, level, argument, value
--                'back'   give-back, due in `argument` ms, no value      'retry'  as 'back' with a new value
--                'dead'   dead letter, died at `argument` ms
-- returns      {refused, batches, wait, now}
--   refused    endings that came too late: their numbers from 0, acks first, in the order of ARGV
--   batches    per queue that something was received from: {queue, lease in ms, ids, values}
--   wait       milliseconds until something falls due or a lease is over; -1: never. Told where nothing was received
--   now        the server's clock in ms

local CHUNK = 50       -- idle lanes that are looked at together
local token, queues, limit = ARGV[1], #KEYS, tonumber(ARGV[2])

local function lease_of(P) return tonumber(redis.call('HGET', P .. 'q', 'lease_ms') or 30000) end

local memo = recall(token)
if memo == false then return {{}, {}, -1, now} end
if memo then
  local batches = {}
  for number = 1, limit > 0 and queues or 0 do
    local P = KEYS[number]
    local ids = redis.call('SMEMBERS', P .. 'g' .. token)
    if #ids > 0 then
      table.sort(ids)
      batches[#batches + 1] = {number, lease_of(P), ids, redis.call('HMGET', P .. 'b', unpack(ids))}
    end
  end
  return {cmsgpack.unpack(memo), batches, 0, now}
end

-- --- endings ---

local refused, number_of_ending = {}, 0

-- Takes ARGV[from..to] out of the batch. Returns those that were in it, and refuses the others.
local function release(P, batch, from, to)
  local group = P .. 'g' .. batch
  local mine = {}
  for i, there in ipairs(redis.call('SMISMEMBER', group, unpack(ARGV, from, to))) do
    if there == 1 then
      mine[#mine + 1] = ARGV[from + i - 1]
    else
      refused[#refused + 1] = number_of_ending + i - 1
    end
  end
  number_of_ending = number_of_ending + to - from + 1
  if #mine > 0 then
    redis.call('SREM', group, unpack(mine))
    redis.call('SREM', P .. 'l', unpack(mine))
    if not redis.call('ZSCORE', P .. 'x', batch) then
      for _, id in ipairs(mine) do redis.call('ZREM', P .. 'x', batch .. '~' .. id) end
    elseif redis.call('EXISTS', group) == 0 then
      redis.call('ZREM', P .. 'x', batch)
    end
  end
  return mine
end

local idle_lanes = tonumber(ARGV[7])
local at = 10 + idle_lanes
for _ = 1, tonumber(ARGV[at - 1]) do
  local P, batch, count = KEYS[tonumber(ARGV[at])], ARGV[at + 1], tonumber(ARGV[at + 2])
  local mine = release(P, batch, at + 3, at + 2 + count)
  if #mine > 0 then redis.call('HDEL', P .. 'b', unpack(mine)) end
  at = at + 3 + count
end

local mourning = {}
local fresh = setmetatable({}, {__index = function(all, number)       -- per queue: levels that something became ready at
  local levels = {}
  all[number] = levels
  return levels
end})
while ARGV[at] do
  local kind, number, batch, id, level, value = ARGV[at], tonumber(ARGV[at + 1]), ARGV[at + 2], ARGV[at + 3], ARGV[at + 4], ARGV[at + 6]
  local argument, P = tonumber(ARGV[at + 5]), KEYS[number]
  if #release(P, batch, at + 3, at + 3) == 1 then
    if kind == 'dead' then
      redis.call('HSET', P .. 'b', id, value)
      redis.call('ZADD', P .. 'd', ARGV[at + 5], id)
      mourning[P] = true
    elseif argument > 0 then
      local due = now + argument
      redis.call('HSET', P .. 'b', id, due_at(kind == 'retry' and value or redis.call('HGET', P .. 'b', id), due))
      local first = redis.call('ZRANGE', P .. 's', 0, 0, 'WITHSCORES')
      redis.call('ZADD', P .. 's', due, level .. id)
      if not first[2] or due < tonumber(first[2]) then wake(P, level) end
    elseif kind == 'retry' then
      redis.call('HSET', P .. 'b', id, value)
      redis.call('RPUSH', P .. 'r' .. level, id)
      fresh[number][level] = true
    else
      push_head(P, level, {id})
      fresh[number][level] = true
    end
  end
  at = at + 7
end
for P in pairs(mourning) do retain(P) end

-- --- receive ---

local ids, values, received, empty = {}, {}, 0, {}

local ghosts = 0       -- passed over so far; of a great many some are left to the next look

-- Up to `most` messages of a lane, the oldest first. An id without a value is a ghost: its message was removed.
local function take(number, level, most)
  local P, taken = KEYS[number], 0
  while taken < most and ghosts < BATCH do
    local popped = redis.call('LPOP', P .. 'r' .. level, most - taken)
    if not popped or #popped == 0 then return taken end
    redis.call('HINCRBY', P .. 'q', 'h' .. level, #popped)
    if not ids[number] then ids[number], values[number] = {}, {} end
    local mine, bodies = ids[number], values[number]
    for i, value in ipairs(redis.call('HMGET', P .. 'b', unpack(popped))) do
      if value then
        mine[#mine + 1], bodies[#bodies + 1] = popped[i], value
        taken = taken + 1
      else
        redis.call('HDEL', P .. 'gh', popped[i])
        ghosts = ghosts + 1
      end
    end
  end
  return taken
end

local batches, wait = {}, -1
if limit > 0 then
  local lanes = cmsgpack.unpack(ARGV[3])
  local short = {}       -- lanes that have no more
  local tended = {}
  for i = 1, #lanes, 3 do
    if lanes[i + 2] > 1 then tended[lanes[i]] = true end
  end
  for number = 1, queues do
    if ARGV[6] == '1' or tended[number] then
      local P = KEYS[number]
      if redis.call('EXISTS', P .. 'b') == 1 then
        promote(P, math.max(200, limit), fresh[number])
        reap(P, fresh[number])
      else
        empty[number] = true
      end
    end
  end
  local awake = {}       -- of the idle lanes those that gave their message: queue, level, quota
  for first = 1, idle_lanes, CHUNK do
    local last = math.min(first + CHUNK - 1, idle_lanes)
    if received < limit and redis.call('EXISTS', unpack(ARGV, 7 + first, 7 + last)) > 0 then
      local idle = cmsgpack.unpack(ARGV[8 + idle_lanes])
      for i = first, last do
        if received < limit and take(idle[2 * i - 1], idle[2 * i], 1) == 1 then
          received = received + 1
          awake[#awake + 1], awake[#awake + 2], awake[#awake + 3] = idle[2 * i - 1], idle[2 * i], 0
        end
      end
    end
  end
  for pass = 1, tonumber(ARGV[5]) do
    if pass == 2 and received < limit and #awake > 0 then
      for i = 1, #lanes do awake[#awake + 1] = lanes[i] end
      local before = {}
      for i, was in pairs(short) do before[i + #awake - #lanes] = was end
      lanes, short = awake, before
    end
    for i = 1, #lanes, 3 do
      if received == limit then break end
      if not empty[lanes[i]] and not short[i] then
        local most = limit - received
        if pass == 1 then most = math.min(most, lanes[i + 2]) end
        if most > 0 then
          local taken = take(lanes[i], lanes[i + 1], most)
          short[i] = taken < most
          received = received + taken
        end
      end
    end
  end
  for number, mine in pairs(ids) do
    if #mine > 0 then
      local P = KEYS[number]
      local lease = lease_of(P)
      redis.call('SADD', P .. 'g' .. token, unpack(mine))
      redis.call('SADD', P .. 'l', unpack(mine))
      redis.call('ZADD', P .. 'x', now + lease, token)
      batches[#batches + 1] = {number, lease, mine, values[number]}
    end
  end
  if received == 0 and ghosts >= BATCH then
    wait = 0
  elseif received == 0 then
    for number = 1, queues do
      local P = KEYS[number]
      if not empty[number] then
        for _, key in ipairs({'s', 'x'}) do
          local first = redis.call('ZRANGE', P .. key, 0, 0, 'WITHSCORES')[2]
          if first then
            local left = math.max(0, tonumber(first) - now)
            if wait < 0 or left < wait then wait = left end
          end
        end
      end
    end
  end
end

-- Whoever took a token hands it on while there is more; so does who made something ready and did not take it all.
local woken = cmsgpack.unpack(ARGV[4])
if received == limit then       -- else there is none
  for i = 1, #woken, 2 do fresh[woken[i]][tostring(woken[i + 1])] = true end
end
for number, levels in pairs(fresh) do
  for level in pairs(levels) do
    if redis.call('EXISTS', KEYS[number] .. 'r' .. level) == 1 then wake(KEYS[number], level) end
  end
end
-- What changed nothing is not remembered: the looks of idle receivers write nothing, and go on when the server's memory is full.
if received > 0 or number_of_ending > 0 then remember(token, cmsgpack.pack(refused)) end
return {refused, batches, wait, now}

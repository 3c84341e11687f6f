-- Stores a batch of new messages at once. Where that is not simple it does nothing and says so; store.lua then goes item by item.
--
-- KEYS[1]      prefix of the queue
-- ARGV[1]      token of the request, 12 characters
-- ARGV[2]      1: the queue may come into being
-- ARGV[3..6]   how many messages are ready at the levels 9, 6, 3, 0
-- ARGV[7]      how many are due at a time of their own
-- then         all ids in this order, all values, and the due times: > 0 an instant, < 0 so many milliseconds from now
-- returns      {word, now}: 'stored', 'unknown' (no such queue yet) or 'careful' (a limit, a known id, or a ghost); now in ms

local token = ARGV[1]
local memo = recall(token)
if memo ~= nil then return {'stored', now} end
local queue = redis.call('HMGET', P .. 'q', 'named', 'max_ready')
if not queue[1] and ARGV[2] ~= '1' then return {'unknown', now} end
if queue[2] or redis.call('EXISTS', P .. 'gh') == 1 then return {'careful', now} end

local count = ARGV[3] + ARGV[4] + ARGV[5] + ARGV[6] + ARGV[7]
local known = redis.call('HMGET', P .. 'b', unpack(ARGV, 8, 7 + count))
for i = 1, count do
  if known[i] then return {'careful', now} end
end

local fields = {}
for i = 1, count do
  fields[2 * i - 1] = ARGV[7 + i]
  fields[2 * i] = ARGV[7 + count + i]
end
local scheduled = tonumber(ARGV[7])
local first_scheduled = count - scheduled
local dues = {}
for i = 1, scheduled do
  local due = tonumber(ARGV[7 + 2 * count + i])
  if due < 0 then
    due = now - due
    fields[2 * (first_scheduled + i)] = due_at(fields[2 * (first_scheduled + i)], due)
  end
  dues[i] = due
end
if count > 0 then redis.call('HSET', P .. 'b', unpack(fields)) end
if not queue[1] then redis.call('HSET', P .. 'q', 'named', 1) end

local at = 8
for i, level in ipairs({9, 6, 3, 0}) do
  local n = tonumber(ARGV[2 + i])
  if n > 0 then
    redis.call('RPUSH', P .. 'r' .. level, unpack(ARGV, at, at + n - 1))
    wake(P, level)
    at = at + n
  end
end
if scheduled > 0 then
  local head = redis.call('ZRANGE', P .. 's', 0, 0, 'WITHSCORES')[2]
  head = head and tonumber(head) or math.huge
  local members, earliest, who = {}, math.huge, nil
  for i, due in ipairs(dues) do
    local id, level = ARGV[at + i - 1], level_of(fields[2 * (first_scheduled + i)])
    if due <= now then
      redis.call('RPUSH', P .. 'r' .. level, id)
      wake(P, level)
    else
      members[#members + 1] = due
      members[#members + 1] = level .. id
      if due < earliest then earliest, who = due, level end
    end
  end
  if #members > 0 then redis.call('ZADD', P .. 's', unpack(members)) end
  if earliest < head then wake(P, who) end
end
remember(token, '')
return {'stored', now}

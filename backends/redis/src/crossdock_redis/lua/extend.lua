-- Renews leases, each for its queue's lease from now. A repeat changes nothing.
--
-- KEYS         prefixes of the queues
-- ARGV         per group: queue (index from 1), batch, how many, ids
-- returns      refused: the numbers, from 0 in the order of ARGV, of those that are not leased in their batch any more

local refused, number, at = {}, 0, 1
while ARGV[at] do
  local P, batch, count = KEYS[tonumber(ARGV[at])], ARGV[at + 1], tonumber(ARGV[at + 2])
  local group = P .. 'g' .. batch
  local named, kept = {}, {}
  for i, there in ipairs(redis.call('SMISMEMBER', group, unpack(ARGV, at + 3, at + 2 + count))) do
    local id = ARGV[at + 2 + i]
    if there == 0 then
      refused[#refused + 1] = number
    elseif not named[id] then
      named[id] = true
      kept[#kept + 1] = id
    end
    number = number + 1
  end
  if #kept > 0 then
    local deadline = now + (redis.call('HGET', P .. 'q', 'lease_ms') or 30000)
    local old = redis.call('ZSCORE', P .. 'x', batch)
    redis.call('ZREM', P .. 'x', batch)       -- needs no memory, and lets the rest through when that is full
    if old and redis.call('SCARD', group) == #kept then
      redis.call('ZADD', P .. 'x', deadline, batch)
    else
      if old then       -- from now on each of the batch has a deadline of its own; those that are not named keep the old one
        for _, id in ipairs(redis.call('SMEMBERS', group)) do
          if not named[id] then redis.call('ZADD', P .. 'x', old, batch .. '~' .. id) end
        end
      end
      for _, id in ipairs(kept) do redis.call('ZADD', P .. 'x', deadline, batch .. '~' .. id) end
    end
  end
  at = at + 3 + count
end
return refused

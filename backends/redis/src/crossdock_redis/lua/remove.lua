-- Deletes messages by id, if they are in this state.
--
-- KEYS[1]      prefix of the queue
-- ARGV[1]      token of the request, 12 characters
-- ARGV[2]      state: ready, scheduled or dead
-- then         ids
-- returns      nil: ask again, time has more to do. Else the numbers, from 0, of the ids that are not in this state

local token, state = ARGV[1], ARGV[2]
local memo = recall(token)
if memo then return cmsgpack.unpack(memo) end
if memo == false then return {} end
if catch_up(P) then return false end

local function is_removed(id)
  local value = redis.call('HGET', P .. 'b', id)
  if not value then return false end
  local level = level_of(value)
  if state == 'dead' then
    if redis.call('ZREM', P .. 'd', id) == 0 then return false end
  elseif state == 'scheduled' then
    if redis.call('ZREM', P .. 's', level .. id) == 0 then return false end
  else
    if redis.call('SISMEMBER', P .. 'l', id) == 1 or redis.call('ZSCORE', P .. 'd', id)
      or redis.call('ZSCORE', P .. 's', level .. id) then return false end
  end
  redis.call('HDEL', P .. 'b', id)       -- before the next write: it needs no memory, and lets that through when it is full
  if state == 'ready' then redis.call('HSET', P .. 'gh', id, level) end
  return true
end

local refused = {}
for i = 3, #ARGV do
  if not is_removed(ARGV[i]) then refused[#refused + 1] = i - 3 end
end
remember(token, cmsgpack.pack(refused))
return refused

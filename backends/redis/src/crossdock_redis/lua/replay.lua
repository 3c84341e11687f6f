-- Brings dead letters back to life: stores each new message and removes its letter, in one step.
--
-- KEYS[1]      prefix of the letters' queue
-- KEYS[2]      prefix of the queue that the messages go to; it comes into being if need be
-- ARGV[1]      token of the request, 12 characters
-- then         per replay: id of the letter, id, value and due of the message (0 now, > 0 an instant, < 0 so many ms from now)
-- returns      nil: ask again, time has more to do. Else a flat list of index from 0 and reason: -1 no such letter, else the
--              generation of this id that the target holds

local token, T = ARGV[1], KEYS[2]
local memo = recall(token)
if memo then return cmsgpack.unpack(memo) end
if memo == false then return {} end
if catch_up(P) then return false end

local refused = {}
for i = 0, (#ARGV - 1) / 4 - 1 do
  local letter, id, value, due = ARGV[2 + 4 * i], ARGV[3 + 4 * i], ARGV[4 + 4 * i], tonumber(ARGV[5 + 4 * i])
  local reason = nil
  if not redis.call('ZSCORE', P .. 'd', letter) then
    reason = -1
  else
    local held = not (P == T and id == letter) and redis.call('HGET', T .. 'b', id)
    if held and generation_of(held) < generation_of(value) then
      reason = generation_of(held)
    else
      redis.call('ZREM', P .. 'd', letter)
      redis.call('HDEL', P .. 'b', letter)
      if not held then
        redis.call('HSET', T .. 'q', 'named', 1)
        rename_ghost(T, id)
        store(T, id, value, due)
      end
    end
  end
  if reason then
    refused[#refused + 1] = i
    refused[#refused + 1] = reason
  end
end
remember(token, cmsgpack.pack(refused))
return refused

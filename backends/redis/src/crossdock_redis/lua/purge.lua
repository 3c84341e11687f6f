-- Deletes up to `most` messages of one state.
--
-- KEYS[1]      prefix of the queue
-- ARGV[1]      token of the request, 12 characters
-- ARGV[2]      state: ready, scheduled or dead
-- ARGV[3]      most messages to delete, up to 1,000
-- returns      nil: ask again, time has more to do. Else {deleted, left}: how many were, and how many such messages are left

local token, state, most = ARGV[1], ARGV[2], tonumber(ARGV[3])
local memo = recall(token)
if memo then return cmsgpack.unpack(memo) end
if memo == false then return {0, 0} end
if catch_up(P) then return false end

local deleted, left = 0, 0
if state == 'ready' then
  for _, level in ipairs({9, 6, 3, 0}) do
    while deleted < most do
      local ids = redis.call('LPOP', P .. 'r' .. level, most - deleted)
      if not ids or #ids == 0 then break end
      redis.call('HINCRBY', P .. 'q', 'h' .. level, #ids)
      redis.call('HDEL', P .. 'gh', unpack(ids))
      deleted = deleted + redis.call('HDEL', P .. 'b', unpack(ids))
    end
  end
  left = ready_count(P)
else
  local key = P .. (state == 'dead' and 'd' or 's')
  local members = redis.call('ZRANGE', key, 0, most - 1)
  if #members > 0 then
    redis.call('ZREM', key, unpack(members))
    if state == 'scheduled' then
      for i, member in ipairs(members) do members[i] = string.sub(member, 2) end
    end
    deleted = redis.call('HDEL', P .. 'b', unpack(members))
  end
  left = redis.call('ZCARD', key)
end
remember(token, cmsgpack.pack({deleted, left}))
return {deleted, left}
